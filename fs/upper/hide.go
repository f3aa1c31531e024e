package upper

import (
	"errors"

	"golang.org/x/sys/unix"
)

// Whiteout hides a name of the lower that the upper has nothing in the place of.
func (d *Dir) Whiteout(dir int, name string) error {
	return unix.Mknodat(dir, name, unix.S_IFCHR, 0)
}

// Hide puts a whiteout in the place of a file of the upper, in one step.
func (d *Dir) Hide(dir int, name string) error {
	tmp := d.temp()
	if err := d.Whiteout(d.staging, tmp); err != nil {
		return err
	}
	if err := unix.Renameat(d.staging, tmp, dir, name); err != nil {
		return errors.Join(err, unix.Unlinkat(d.staging, tmp, 0))
	}
	return nil
}

// RemoveDir removes a directory that shows nothing: there may be whiteouts in
// it. Where hide says so, a whiteout takes its place, in the same step.
func (d *Dir) RemoveDir(dir int, name string, hide bool) error {
	if !hide {
		err := unix.Unlinkat(dir, name, unix.AT_REMOVEDIR)
		if !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EEXIST) {
			return err
		}
	}
	tmp := d.temp()
	if !hide {
		if err := unix.Renameat(dir, name, d.staging, tmp); err != nil {
			return err
		}
	} else {
		if err := d.Whiteout(d.staging, tmp); err != nil {
			return err
		}
		if err := unix.Renameat2(d.staging, tmp, dir, name, unix.RENAME_EXCHANGE); err != nil {
			return errors.Join(err, unix.Unlinkat(d.staging, tmp, 0))
		}
	}
	// It is gone for everybody. What may stay in staging is cleared by Open.
	d.clear(tmp)
	return nil
}

// clear removes a directory of whiteouts from staging.
func (d *Dir) clear(name string) {
	fd, err := Dirfd(d.staging, name)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	ReadDir(fd, func(e *Dirent) bool {
		if string(e.Name) != "." && string(e.Name) != ".." {
			unix.Unlinkat(fd, string(e.Name), 0)
		}
		return true
	})
	unix.Unlinkat(d.staging, name, unix.AT_REMOVEDIR)
}

// Bare puts an empty opaque directory like the one there in the place of a
// directory that shows nothing, so that another may be renamed over it.
func (d *Dir) Bare(dir int, name string) error {
	var st unix.Stat_t
	if err := (At{Dir: dir, Name: name}).Lstat(&st); err != nil {
		return err
	}
	tmp := d.temp()
	if err := unix.Mkdirat(d.staging, tmp, st.Mode&0o7777|0o700); err != nil {
		return err
	}
	at := At{Dir: d.staging, Name: tmp}
	err := d.SetOpaque(at)
	if err == nil && d.Form != Override {
		err = at.chown(int(st.Uid), int(st.Gid))
	}
	if err == nil {
		err = unix.Renameat2(d.staging, tmp, dir, name, unix.RENAME_EXCHANGE)
	}
	if err != nil {
		return errors.Join(err, remove(d.staging, tmp, unix.S_IFDIR))
	}
	d.clear(tmp)
	return nil
}

// Rename moves a file of the upper over what is at its new place, if anything.
// With hide, a whiteout stays at the old one, in the same step.
func (d *Dir) Rename(from int, name string, to int, newName string, hide bool) error {
	if !hide {
		return unix.Renameat(from, name, to, newName)
	}
	return unix.Renameat2(from, name, to, newName, unix.RENAME_WHITEOUT)
}

// Exchange swaps two files of the upper.
func (d *Dir) Exchange(from int, name string, to int, newName string) error {
	return unix.Renameat2(from, name, to, newName, unix.RENAME_EXCHANGE)
}

// LinkOver makes one more name of a file where a whiteout lies, in one step.
func (d *Dir) LinkOver(at At, dir int, name string) error {
	tmp := d.temp()
	if err := at.LinkTo(d.staging, tmp); err != nil {
		return err
	}
	if err := unix.Renameat(d.staging, tmp, dir, name); err != nil {
		return errors.Join(err, unix.Unlinkat(d.staging, tmp, 0))
	}
	return nil
}
