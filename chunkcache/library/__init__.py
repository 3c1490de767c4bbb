"""Token ids to chunk KV: out of the store, or computed by the model and then stored."""
