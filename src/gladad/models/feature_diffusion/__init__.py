"""``lite``: the method in a space of frozen features."""
