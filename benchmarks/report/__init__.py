"""Result files as a page with pictures, or one against another."""
