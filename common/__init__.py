"""What both sides and the auditor must agree on; no network, and neither client nor server is imported.

Read in this order: plan, accounting, examples, adapter, model, ring, messages, cli.
"""
