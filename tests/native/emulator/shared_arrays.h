// Finds a kernel's shared arrays, so that they can be filled with garbage before every block.
//
// On the host a `__shared__` array is a static variable of its kernel, and the mangled name of such a
// variable holds the kernel's: `kernel(int)` is `_ZL6kerneli`, its array `sums` is `_ZZL6kerneliE4sums`. So
// the program reads its own symbol table. (A linker section would be simpler, but GCC ignores the section
// attribute on variables of templates: bug 41091.)
#pragma once

#include <elf.h>
#include <link.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace vrthinker::emulator {

struct SharedArray {
    char* data;
    std::size_t bytes;
};

inline std::vector<char> read_program() {
    std::FILE* file = std::fopen("/proc/self/exe", "rb");
    std::vector<char> bytes;
    char chunk[1 << 16];
    while (file) {
        const std::size_t count = std::fread(chunk, 1, sizeof chunk, file);
        if (count == 0) {
            std::fclose(file);
            break;
        }
        bytes.insert(bytes.end(), chunk, chunk + count);
    }
    return bytes;
}

// Where the program was loaded: what its symbol table's addresses are relative to.
inline std::uintptr_t load_address() {
    std::uintptr_t address = 0;
    dl_iterate_phdr(
        [](dl_phdr_info* info, std::size_t, void* found) {
            *static_cast<std::uintptr_t*>(found) = info->dlpi_addr;
            return 1;  // the first one is the program
        },
        &address);
    return address;
}

// The writable static variables of the kernel at `kernel`. Exits where the kernel has no symbol: without
// one, a test that relies on the garbage would rest on nothing.
inline std::vector<SharedArray> find_shared_arrays(std::uintptr_t kernel) {
    static const std::vector<char> program = read_program();
    const std::uintptr_t base = load_address();
    const auto* header = reinterpret_cast<const Elf64_Ehdr*>(program.data());
    const auto* sections = reinterpret_cast<const Elf64_Shdr*>(program.data() + header->e_shoff);
    for (int s = 0; s < header->e_shnum; ++s) {
        if (sections[s].sh_type != SHT_SYMTAB) {
            continue;
        }
        const auto* symbols = reinterpret_cast<const Elf64_Sym*>(program.data() + sections[s].sh_offset);
        const auto* end = symbols + sections[s].sh_size / sizeof(Elf64_Sym);
        const char* names = program.data() + sections[sections[s].sh_link].sh_offset;
        std::string prefix;
        for (const auto* symbol = symbols; symbol != end; ++symbol) {
            const char* name = names + symbol->st_name;
            if (ELF64_ST_TYPE(symbol->st_info) == STT_FUNC && base + symbol->st_value == kernel &&
                std::strncmp(name, "_Z", 2) == 0) {
                prefix = std::string("_ZZ") + (name + 2) + "E";
            }
        }
        if (prefix.empty()) {
            continue;
        }
        std::vector<SharedArray> arrays;
        for (const auto* symbol = symbols; symbol != end; ++symbol) {
            const char* name = names + symbol->st_name;
            if (ELF64_ST_TYPE(symbol->st_info) == STT_OBJECT && symbol->st_shndx < header->e_shnum &&
                (sections[symbol->st_shndx].sh_flags & SHF_WRITE) != 0 &&  // constant tables stay
                std::strncmp(name, prefix.c_str(), prefix.size()) == 0) {
                arrays.push_back({reinterpret_cast<char*>(base + symbol->st_value), symbol->st_size});
            }
        }
        return arrays;
    }
    std::fputs("emulator: the kernel has no symbol; compile it into the program, unstripped\n", stderr);
    std::_Exit(70);
}

}  // namespace vrthinker::emulator
