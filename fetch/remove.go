package fetch

import "errors"

// Remove deletes a layer from the store, its data file with it, and calls then with
// what came of it: at once, or when nobody has the layer open any more. Who opens it
// until then keeps it; who asks for it afterwards has it made anew.
func (f *Fetcher) Remove(l *Layer, then func(error)) {
	l.mu.Lock()
	l.unwanted = then
	l.mu.Unlock()
	f.removeUnwanted(l)
}

// removeUnwanted removes a layer that nobody wants or has open.
func (f *Fetcher) removeUnwanted(l *Layer) {
	then, err := f.release(l)
	if then == nil {
		return
	}
	l.end()
	then(errors.Join(err, l.close()))
}

// release has nobody find a layer any more that is to be removed and can be.
func (f *Fetcher) release(l *Layer) (then func(error), err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if f.layers[l.Key] != l || l.handles > 0 || l.unwanted == nil || f.passes[l.Key] != nil {
		return nil, nil
	}
	l.gone = true
	delete(f.layers, l.Key)
	return l.unwanted, f.store.Remove(l.Key) // before another can open it again
}

// Usage gives what a layer takes on the disk, in bytes.
func (l *Layer) Usage() int64 { return l.f.store.Usage(l.Key) }
