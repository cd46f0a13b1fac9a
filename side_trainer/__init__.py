"""The trainer: broker → inbox → journal → learner → checkpoint → publisher.

It sees activations, never data, and holds no backbone.
"""
