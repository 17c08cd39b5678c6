"""What runs at the coordinator: it sees sums, never a single site's update.

Read in this order: rounds, aggregate, store, evaluate, app.
"""
