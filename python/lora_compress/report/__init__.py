"""A plan as one HTML page that needs no network: charts, a budget to play with, and every tensor."""

from lora_compress.report.document import notebook, page

__all__ = ["notebook", "page"]
