"""Every metric, named and described once."""


class HttpMetrics:
    """What one ingress process counts."""
