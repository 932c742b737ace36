"""The demo: AdamW against Shampoo on low-bit state, and a resume in a fresh process."""
