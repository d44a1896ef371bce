"""Mechanism: run one batch on one kind of device."""
