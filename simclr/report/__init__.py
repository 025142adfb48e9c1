"""A run as one page: what its encoder is worth, how it learned, what it sees as alike.

`run` reads the run folder, `sample` chooses images and looks at them with the encoder, `pictures` draws, `sections`
says what stands in each section; the words and the marks of HTML are in `templates`, which `page` fills.
"""

from simclr.report.page import REPORT, write_report
from simclr.report.run import read_metrics, read_results

__all__ = ["REPORT", "read_metrics", "read_results", "write_report"]
