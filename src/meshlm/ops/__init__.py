"""Arrays in, arrays out: products, rotary embedding, attention, loss. Imports core."""
