"""What runs beside the data: it reads rows, trains privately, and decides what may leave.

Read in this order: table, data, mechanism, trainer, agent, postbox, app.
"""
