"""Measurements as pages: one file each, with everything in it and without requests.

document    the file around a page: style, scripts, and a policy that allows nothing else
pictures    heat maps, and the data of the drawings
tables      tables that can be sorted, filtered and downloaded
page        the report of one merge, and its first screen for a notebook
comparison  several merges, or several targets of one, side by side

jinja2 escapes the names from files. uPlot draws (assets/uPlot.LICENSE); heat maps are tables, which need no script and can be
read aloud.
"""

from qmerge.report.html.comparison import comparison_page
from qmerge.report.html.page import NAME, html_report, summary

__all__ = ["NAME", "comparison_page", "html_report", "summary"]
