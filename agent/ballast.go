package agent

// ballast, as long as it is held, makes the garbage collector wait until the heap has grown by some
// tens of MiB. A node holds a few MiB at a time, but makes that much garbage
// every few hundred calls, and was collecting it dozens of times a second, with
// a fifth of the processor time of a call. Unlike a higher GOGC this costs the
// same however much a node holds. It is never touched, so the system does not
// back it with memory; and it holds no pointers, so nobody looks into it.
func ballast() []byte { return make([]byte, ballastBytes) }

const ballastBytes = 16 << 20
