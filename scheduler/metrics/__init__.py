"""What Prometheus is told: every series, defined once, and few enough of them whoever comes."""
