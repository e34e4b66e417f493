"""What a device is to the workers: its memory and its threads. The only place that knows vendors."""
