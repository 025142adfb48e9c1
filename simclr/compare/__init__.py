"""Runs beside each other: which settings differ, what each reached, and how they learned.

`runs` reads a run folder, whatever state it is in; `rows` finds what differs, joins seeds and takes the final figures;
`paired` tests two runs on the same test images; `neighbours` asks their encoders for the nearest images; `text` and
`page` show it.
"""

from simclr.compare.neighbours import neighbours_beside
from simclr.compare.page import write_page
from simclr.compare.rows import Comparison, compare_runs
from simclr.compare.text import as_csv, as_markdown, print_comparison

__all__ = ["Comparison", "as_csv", "as_markdown", "compare_runs", "neighbours_beside", "print_comparison", "write_page"]
