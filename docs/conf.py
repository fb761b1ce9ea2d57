"""Settings of the documentation's site (`make docs`)."""

project = "fastar"
html_title = "fastar"
extensions = ["myst_parser"]
html_theme = "furo"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
# Code in CONTRIBUTING.md and the source tree is not part of the site.
myst_enable_extensions = ["colon_fence"]
suppress_warnings = ["myst.header", "misc.highlighting_failure"]
