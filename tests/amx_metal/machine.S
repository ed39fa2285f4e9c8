// From reset to C++: this program is the firmware of its machine, so there is no BIOS, no disk and no boot loader.
// machine.ld says where things lie. Memory is mapped one to one, in pages of 2 MB, with holes (see machine.h).

        .set PRESENT_WRITABLE, 0x03
        .set LARGE, 0x80
        .set CODE32, 0x08
        .set DATA32, 0x10
        .set CODE64, 0x18

        .section .reset, "ax"
rom_top:                                // 4 GB - 4 KB; in real mode at reset, offset 0xF000 of its segment
        .code16
enter:  cli
        lgdtl   %cs:(rom_gdt_pointer - rom_top + 0xF000)
        movl    %cr0, %eax
        orl     $1, %eax                // PE
        movl    %eax, %cr0
        ljmpl   $CODE32, $protected
        .code32
protected:
        movw    $DATA32, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        cld
        movl    $program_in_rom, %esi
        movl    $program, %edi
        movl    $program_bytes, %ecx
        rep movsb
        movl    $bss, %edi
        movl    $bss_bytes, %ecx
        xorl    %eax, %eax
        rep stosb
        movl    $in_memory, %eax        // absolute: paging will leave the ROM behind
        jmp     *%eax

rom_gdt_pointer:
        .word   4 * 8 - 1
        .long   gdt_in_rom
        .org    0xFF0
        .code16
        .globl  reset
reset:  jmp     enter
        .org    0x1000

        .text
        .code32
in_memory:
        lgdtl   gdt_pointer
        movl    %cr4, %eax
        orl     $0x40620, %eax          // PAE, OSFXSR, OSXMMEXCPT, OSXSAVE
        movl    %eax, %cr4
        movl    $page_map, %eax
        movl    %eax, %cr3
        movl    $0xC0000080, %ecx       // EFER
        rdmsr
        orl     $0x100, %eax            // LME
        wrmsr
        movl    $0x80000023, %eax       // PG, NE, MP, PE; caches on, EM and TS off
        movl    %eax, %cr0
        ljmpl   $CODE64, $long_mode

        .balign 8
        .globl  gdt
gdt:    .quad   0
        .quad   0x00CF9A000000FFFF      // CODE32
        .quad   0x00CF92000000FFFF      // DATA32
        .quad   0x00AF9A000000FFFF      // CODE64
gdt_pointer:
        .word   . - gdt - 1
        .long   gdt

        .code64
long_mode:
        movl    $stack_end, %esp
        fninit
        movl    $thread_locals_end, %eax        // FS:0 points to itself, what is thread_local lies below
        movq    %rax, (%rax)
        xorl    %edx, %edx
        movl    $0xC0000100, %ecx               // FS base
        wrmsr
        call    start

// What the processor may raise: the vectors' entry points, which bring every frame to the same shape.
        .macro entry vector
entry_\vector:
        .ifeq (\vector - 8) * (\vector - 10) * (\vector - 11) * (\vector - 12) * (\vector - 13) * (\vector - 14) * (\vector - 17) * (\vector - 21)
        .else
        pushq   $0                              // these have no error code
        .endif
        pushq   $\vector
        jmp     any_fault
        .pushsection .rodata.fault_entries, "a"
        .quad   entry_\vector
        .popsection
        .endm

        .section .rodata.fault_entries, "a"
        .balign 8
        .globl  fault_entries
fault_entries:
        .text
        .altmacro
        .set    vector, 0
        .rept   32
        entry   %vector
        .set    vector, vector + 1
        .endr
        .noaltmacro
any_fault:
        movq    %rsp, %rdi
        andq    $-16, %rsp
        call    fault

        .data
        .balign 4096
page_map:
        .quad   page_directories + PRESENT_WRITABLE
        .fill   511, 8, 0
page_directories:
        .quad   page_directory + PRESENT_WRITABLE
        .fill   511, 8, 0
page_directory:
        .quad   0                               // what null points to
        .set    page, 0x200000
        .rept   6                               // the program, up to 14 MB
        .quad   page + PRESENT_WRITABLE + LARGE
        .set    page, page + 0x200000
        .endr
        .rept   1 + 8                           // the stack at 16 MB; the arenas at 20, 24, ... MB
        .quad   0
        .set    page, page + 0x200000
        .quad   page + PRESENT_WRITABLE + LARGE
        .set    page, page + 0x200000
        .endr
        .fill   512 - 7 - 18, 8, 0

        .section .note.GNU-stack, "", @progbits
