"""A run folder, or a folder of runs, as one HTML page that needs nothing else. Imports no torch."""

from fastar.report.page.run_page import write_page
