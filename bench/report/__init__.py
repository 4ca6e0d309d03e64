"""``secateur report``: one page about everything that was measured, with the data inside it.

inputs     result files and manifests, and the data inside a report
subjects   the models that they speak of, joined over all results
tables     rows of text
charts     figures
page       HTML or Markdown
"""

from __future__ import annotations

from secateur.bench.report.inputs import extract
from secateur.bench.report.page import Report, make_report

__all__ = ["Report", "extract", "make_report"]
