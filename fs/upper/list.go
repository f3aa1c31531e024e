package upper

import (
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"
)

// A Dirent is a name in a directory of an upper. Name is good until the next.
type Dirent struct {
	Name []byte
	Ino  uint64
	Type uint8 // DT_*, DT_UNKNOWN where the filesystem does not say
}

// ReadDir gives the entries of a directory, "." and ".." and whiteouts among
// them, in the order of the filesystem until fn returns false. dir may be an
// O_PATH descriptor.
func ReadDir(dir int, fn func(e *Dirent) bool) error {
	fd, err := unix.Openat(dir, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var e Dirent
	buf := make([]byte, 1<<15)
	for {
		n, err := unix.Getdents(fd, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n <= 0 {
			return err
		}
		// struct linux_dirent64: d_ino, d_off, d_reclen, d_type, d_name.
		for b := buf[:n]; len(b) >= 19; {
			size := int(binary.NativeEndian.Uint16(b[16:]))
			if size < 19 || size > len(b) {
				return unix.EIO
			}
			e = Dirent{Ino: binary.NativeEndian.Uint64(b), Type: b[18], Name: b[19:size]}
			for i, c := range e.Name {
				if c == 0 {
					e.Name = e.Name[:i]
					break
				}
			}
			if !fn(&e) {
				return nil
			}
			b = b[size:]
		}
	}
}
