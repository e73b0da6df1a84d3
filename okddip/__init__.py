"""Online knowledge distillation with diverse peers, and what it is compared with."""

__version__ = "0.1.0"
