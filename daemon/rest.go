package daemon

import (
	"time"

	"github.com/varvefs/varve/fs"
)

// rest says how many pages of data files, by layer, the page cache held when it
// was last looked at.
//
// What is read through a mount is cached twice, as the mount's and as the data
// file's, or three times where the daemon serves that. All are of use for a while: neighbours that were read ahead serve who
// walks, and what has just been fetched serves the mounts that come next. At rest
// the others are only memory.
type rest map[string]uint64

// restAfter is how long nothing of a data file comes into the page cache before it
// is at rest. What was written to it has reached the disk by then.
const restAfter = 30 * time.Second

// forget has the pages of those given up that are at rest.
func (r rest) forget(layers map[string]fs.Data, forget func(key string, data fs.Data)) {
	for key := range r {
		if layers[key] == nil {
			delete(r, key)
		}
	}
	for key, l := range layers {
		pages, dirty, err := fs.Cached(l.Fd())
		if err != nil {
			continue // the kernel does not tell; it gives up pages when it needs some
		}
		if last, seen := r[key]; seen && pages > 0 && pages == last && dirty == 0 {
			forget(key, l)
			pages = 0
		}
		r[key] = pages
	}
}
