"""From headers to steps: what happens to every weight. Everything wrong with the inputs is found here."""
