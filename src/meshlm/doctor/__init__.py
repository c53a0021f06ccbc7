"""What `meshlm doctor` says: what is installed, what the machine has, what stands in the way.

It reads the machine and runs three small programs through JAX. It asks no network.
"""

from meshlm.doctor.diagnosis import Diagnosis, diagnose
from meshlm.doctor.text import render

__all__ = ["Diagnosis", "diagnose", "render"]
