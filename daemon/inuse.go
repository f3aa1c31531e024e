package daemon

import (
	"sync"

	"github.com/varvefs/varve/image"
)

// inUse are the images that something is done with: from the moment that their layers
// are known, which is before any of them is open, until what they are for is recorded,
// or over. The zero value has none.
type inUse struct {
	// deciding is held while it is found out what nobody needs, and that is deleted:
	// what begins to be used meanwhile waits, and finds it gone.
	deciding sync.Mutex

	mu        sync.Mutex     // guards what follows
	manifests map[string]int // by digest
	layers    map[string]int
}

// use has an image in use until release is called.
func (u *inUse) use(m *image.Manifest) (release func()) {
	u.deciding.Lock()
	defer u.deciding.Unlock()
	u.count(m, 1)
	return sync.OnceFunc(func() { u.count(m, -1) })
}

func (u *inUse) count(m *image.Manifest, by int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.manifests == nil {
		u.manifests, u.layers = map[string]int{}, map[string]int{}
	}
	add(u.manifests, m.Digest.String(), by)
	for _, l := range m.Layers {
		add(u.layers, l.Digest.String(), by)
	}
}

func add(counts map[string]int, key string, by int) {
	if counts[key] += by; counts[key] == 0 {
		delete(counts, key)
	}
}
