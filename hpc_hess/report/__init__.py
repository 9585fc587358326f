"""What every figure and page is made with: style, densities, words for a spectrum, HTML templates."""
