"""Forms of operations for CPUs, each with a plain reference that it is tested against.

xla.py        products in the forms for which XLA has fast kernels
streamed.py   products and attention of decoding, by compiled kernels
library.py    the compiled kernels' library: products.c, attention.c, calls.c (XLA's way in)
"""
