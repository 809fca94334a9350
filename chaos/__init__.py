"""What happens to calls when processes, hosts and networks fail: `python -m chaos`."""
