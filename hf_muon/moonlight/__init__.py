"""How Moonlight was trained, besides its optimizer: schedule, batch ramp, expert balancing, gate scale."""
