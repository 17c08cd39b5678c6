"""What runs beside the data: it reads rows, trains privately, and decides what may leave.

Read in this order: data, trainer, agent, postbox, app.
"""
