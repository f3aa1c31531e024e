// Package commit makes of what was written into a mount a layer, and of that an
// image; and says what it was that was written.
//
// All of it reads the upper, and asks the image's index for names and
// attributes. The contents of the image are read by [Export] alone.
package commit
