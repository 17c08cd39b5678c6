"""The whole federation on one machine, with the code a real one runs, and what is measured with it.

Read in this order: scenarios, partition, insecure, federation, study, bench, cli.
"""
