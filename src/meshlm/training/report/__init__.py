"""`report.html`: one self-contained page about a run, made from its folder alone."""

from pathlib import Path

from meshlm.core import files
from meshlm.training.report.page import page_html
from meshlm.training.report.record import read_record

REPORT_FILE = "report.html"


def write_report(run_folder: str | Path) -> Path:
    """The path of the page it writes (or replaces whole) into the run's folder.

    The page needs no network, no other file and no server, and works without scripts. It reads
    `metrics.jsonl`, `config.json`, `samples/*.json` and `incidents.jsonl`; what is missing or
    damaged is left out, so that a report can be made of any run at any moment.
    """
    folder = Path(run_folder)
    path = folder / REPORT_FILE
    # A sampled text may hold half a surrogate pair, which UTF-8 cannot.
    files.replace(path, page_html(read_record(folder)).encode("utf-8", "replace"))
    return path
