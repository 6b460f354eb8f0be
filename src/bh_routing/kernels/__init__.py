"""Fused forms of the router and of the experts, each beside a twin in plain torch."""
