"""The whole federation on one machine, with the code a real one runs, and what is measured with it.

Read in this order: scenarios, setting, cohort, partition, insecure, federation, study, flower, bench, cli.
"""
