"""Figures, Markdown and exports, made from a results folder alone, without torch."""

from bh_routing.report.charts import create_visualizations
from bh_routing.report.markdown import generate_markdown_report

__all__ = ["create_visualizations", "generate_markdown_report"]
