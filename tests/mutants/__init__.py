"""Deliberately wrong norms, each with one mistake that a kernel has made somewhere; the suite must reject every one."""
