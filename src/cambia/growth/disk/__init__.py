"""Growth of a checkpoint on the disk, larger than memory if need be.

>>> from cambia.growth.disk.offline import plan_checkpoint, write_grown
"""
