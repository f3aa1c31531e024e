package fs

import (
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/varvefs/varve/index"
)

// DataFiles is a FUSE directory that has nothing in it but data files, for the
// kernel's EROFS to read through: the kernel does all that concerns names, and
// asks here only for bytes that it has not cached. A file's node id is its place
// in the list plus two, and is never given to another.
type DataFiles struct {
	fuse.RawFileSystem
	fault  func(name string, off int64, err error)
	ops    *ops
	server *fuse.Server

	mu    sync.RWMutex // guards what follows
	names map[string]uint64
	files []*dataFile
}

type dataFile struct {
	Data
	name   string
	direct atomic.Bool // see Direct

	mu      sync.Mutex
	refused []uint64 // a bit a block: reads that begin there are not refused again
}

// NewDataFiles gives an empty directory.
func NewDataFiles(o Options, fault func(name string, off int64, err error)) *DataFiles {
	return &DataFiles{RawFileSystem: fuse.NewDefaultRawFileSystem(), fault: fault, ops: newOps(o.Metrics), names: map[string]uint64{}}
}

func (d *DataFiles) String() string { return "varve data" }

// Init is told who serves the directory.
func (d *DataFiles) Init(server *fuse.Server) { d.server = server }

// GiveUp has the kernel give up the pages that it has cached of a data file, but for
// those of who reads through it.
func (d *DataFiles) GiveUp(name string) {
	d.mu.RLock()
	id, ok := d.names[name]
	d.mu.RUnlock()
	if ok {
		d.server.InodeNotify(id, 0, 0) // it may know nothing of it
	}
}

// Add makes a data file visible under a name, in the place of another that had it.
func (d *DataFiles) Add(name string, f Data) {
	d.mu.Lock()
	old, had := d.names[name]
	if had && d.files[old-2].Data == f {
		d.mu.Unlock()
		return
	}
	if had {
		d.files[old-2] = nil
	}
	d.files = append(d.files, &dataFile{Data: f, name: name})
	d.names[name] = uint64(len(d.files)) + 1
	d.mu.Unlock()
	if had {
		d.forgotten(old, name)
	}
}

// Remove takes a data file away that nobody reads through any more, unless another has
// its name by now.
func (d *DataFiles) Remove(name string, f Data) {
	d.mu.Lock()
	id, ok := d.names[name]
	if ok = ok && d.files[id-2].Data == f; ok {
		delete(d.names, name)
		d.files[id-2] = nil
	}
	d.mu.Unlock()
	if ok {
		d.forgotten(id, name)
	}
}

// forgotten has the kernel forget a file, of which it may know nothing.
func (d *DataFiles) forgotten(id uint64, name string) {
	d.server.InodeNotify(id, 0, 0)
	d.server.EntryNotify(fuse.FUSE_ROOT_ID, name)
}

// Direct says that somebody reads a data file without the page cache. What he asks
// for he wants.
func (d *DataFiles) Direct(name string) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if id, ok := d.names[name]; ok {
		d.files[id-2].direct.Store(true)
	}
}

func (d *DataFiles) file(id uint64) *dataFile {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if i := id - 2; i < uint64(len(d.files)) {
		return d.files[i]
	}
	return nil
}

func (d *DataFiles) attr(id uint64, out *fuse.Attr) bool {
	out.Ino, out.Nlink, out.Blksize = id, 1, index.BlockSize
	if id == fuse.FUSE_ROOT_ID {
		out.Mode = fuse.S_IFDIR | 0o500
		return true
	}
	f := d.file(id)
	if f == nil {
		return false
	}
	out.Mode, out.Size = fuse.S_IFREG|0o400, uint64(f.Size())
	out.Blocks = out.Size / 512
	return true
}

func (d *DataFiles) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	d.mu.RLock()
	id, ok := d.names[name]
	d.mu.RUnlock()
	if !ok || h.NodeId != fuse.FUSE_ROOT_ID {
		return fuse.ENOENT // not for long: more files come
	}
	out.NodeId, out.Generation = id, 1
	out.SetEntryTimeout(forever)
	out.SetAttrTimeout(forever)
	d.attr(id, &out.Attr)
	return fuse.OK
}

func (d *DataFiles) GetAttr(_ <-chan struct{}, h *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	out.SetTimeout(forever)
	if !d.attr(h.NodeId, &out.Attr) {
		return fuse.ENOENT
	}
	return fuse.OK
}

func (d *DataFiles) Open(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status {
	return fuse.ENOSYS // see Tree.Open
}

func (d *DataFiles) OpenDir(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status {
	return fuse.ENOSYS
}

func (d *DataFiles) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.ENOSYS }

func (d *DataFiles) ReadDir(_ <-chan struct{}, h *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return fuse.OK // names are for those who know them
}

func (d *DataFiles) ReadDirPlus(_ <-chan struct{}, h *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return fuse.OK
}

// Read answers from the data file. The kernel reads ahead past the end of the file
// that somebody reads, into those that are its neighbours in the layer: where they are
// not here, a read of several pages is refused. What did not come so the kernel asks
// for once more, a page or a folio at a time, where it is wanted (filemap_update_page in
// mm/filemap.c).
func (d *DataFiles) Read(_ <-chan struct{}, h *fuse.ReadIn, _ []byte) (_ fuse.ReadResult, st fuse.Status) {
	said := fuse.OK
	defer d.ops.done(opRead, time.Now(), &said)
	f := d.file(h.NodeId)
	if f == nil {
		return nil, fuse.ENOENT
	}
	off := int64(h.Offset)
	n := min(int64(h.Size), f.Size()-off)
	if n <= 0 {
		return fuse.ReadResultData(nil), fuse.OK
	}
	r, err := f.read(off, n)
	switch {
	case err != nil:
		said = status(err)
		d.fault(f.name, off, err)
		return nil, said
	case r == nil:
		return nil, fuse.EIO
	}
	return r, fuse.OK
}

// read gives what is asked for, or nothing where the kernel is to ask again.
func (f *dataFile) read(off, n int64) (fuse.ReadResult, error) {
	first, ok := f.Data.(firstHolder)
	if !ok || f.direct.Load() {
		return hold(f.Data, off, n)
	}
	wanted := f.wasRefused(off, n) || n <= int64(os.Getpagesize())
	if all, err := first.HoldFirst(off, n, wanted); err != nil {
		return nil, err
	} else if !all {
		f.refuse(off, n)
		return nil, nil
	}
	return send(f.Data, off, n)
}

// firstHolder is Data that knows what is worth reading ahead.
type firstHolder interface {
	HoldFirst(off, n int64, wanted bool) (all bool, err error)
}

// refuse has reads that begin in a range answered from now on: a reader whose second
// request fails is told so.
func (f *dataFile) refuse(off, n int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.refused == nil {
		f.refused = make([]uint64, (f.Size()/index.BlockSize+64)/64)
	}
	for b := off / index.BlockSize; b*index.BlockSize < off+n; b++ {
		f.refused[b/64] |= 1 << (b % 64)
	}
}

// wasRefused reports whether a range begins where another was refused, and forgets
// that one as far as they are the same.
func (f *dataFile) wasRefused(off, n int64) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	b := off / index.BlockSize
	if f.refused == nil || f.refused[b/64]&(1<<(b%64)) == 0 {
		return false
	}
	for ; b*index.BlockSize < off+n; b++ {
		f.refused[b/64] &^= 1 << (b % 64)
	}
	return true
}

func (d *DataFiles) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	out.Bsize, out.Frsize = index.BlockSize, index.BlockSize
	return fuse.OK
}
