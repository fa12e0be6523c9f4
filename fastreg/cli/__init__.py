"""The commands of ``python -m fastreg`` and the timing core that bench/ shares with them."""
