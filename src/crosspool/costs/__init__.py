"""What a layer task costs: predicted from operations and bytes, corrected by what was measured."""
