"""Other people's programs, under our rules. Each needs its own optional extra."""
