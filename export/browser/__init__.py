"""Serving the page that measures to a phone's browser, and the static site. Installed as `shvit.export.browser`."""
