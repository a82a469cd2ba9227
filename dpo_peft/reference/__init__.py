"""The reference policy inside the one model: adapter off or frozen, its fingerprint, its log-probs on disk."""
