"""Charts of the package, each defined once for PNG, PDF, SVG and report.html."""

from bh_routing.report.charts import experiments, layers, quality
from bh_routing.report.charts.chart import Chart, draw_charts

__all__ = ["Chart", "draw_charts", "experiments", "layers", "quality"]
