"""Fused routers, experts and decode steps, each with a reference implementation in torch."""
