"""Stage fetch-vqav2: how data arrive. Sources, the contract that records keep, the page that shows them."""
