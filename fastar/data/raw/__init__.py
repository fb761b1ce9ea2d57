"""Raw data as their publishers offer them: files and folders, read into images and labels."""
