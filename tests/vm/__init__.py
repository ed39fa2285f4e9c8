"""Whole virtual machines with several NUMA nodes, in software emulation, and fourfold inside them.

`guest` runs inside and reports, `payload` packs what it needs, `boot` starts the machine, `verdict` judges the report.
"""
