"""report.html: what a run did, on one page that opens without a network."""

from slothcore.report.page import write_report

__all__ = ["write_report"]
